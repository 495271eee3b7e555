"""What stands between a trained policy and the robot: load it, evaluate it on recordings, compare evaluations."""
