"""What this relay knows of its cluster: server objects, the store they are kept in, and who hears of changes."""
