"""A simulated UR10e: kinematics, a rendered camera, a scripted expert, and a recorder of rosbag2 folders."""
