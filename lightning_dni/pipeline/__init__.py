"""Stages of one model in several processes: splitting, transport, schedule. torch only."""
