"""The two commands, and the doctor."""
