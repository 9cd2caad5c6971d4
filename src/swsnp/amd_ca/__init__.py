"""What imitates AMD's key service: hierarchies in its shape, under keys of our own."""
