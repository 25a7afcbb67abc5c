"""What a layout costs: parameters, FLOPs, bytes and seconds, from shapes and a cluster's figures.
No torch, no devices."""
