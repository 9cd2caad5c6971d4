"""What a VM has beside processors and memory: devices at ports and in memory, on one bus."""
