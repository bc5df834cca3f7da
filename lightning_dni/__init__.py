"""Train Lightning modules with synthetic gradients (Decoupled Neural Interfaces)."""
