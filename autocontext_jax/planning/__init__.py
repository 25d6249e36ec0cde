"""What a program needs, for accelerators that need not be there."""
