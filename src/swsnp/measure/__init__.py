"""What a launch is measured to."""
