"""Where layout, schedule and estimate meet: a config becomes a plan. Pure: no torch, no devices."""
