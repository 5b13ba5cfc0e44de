"""What pays: fan-out, costs, speed model, planner (pure)."""
