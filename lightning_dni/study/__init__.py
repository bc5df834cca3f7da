"""Studies, which compare several trainings or functions from one YAML, and the recipes that ship."""
