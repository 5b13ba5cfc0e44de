"""What passes between the two halves, imported by both."""
