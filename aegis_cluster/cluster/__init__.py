"""What the cluster knows of itself: nodes, topics and where their replicas live."""
