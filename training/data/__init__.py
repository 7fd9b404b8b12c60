"""What a run trains on: sources, crops kept on the disk, samples with their labels, augmented views."""
