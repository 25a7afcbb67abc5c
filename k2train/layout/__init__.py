"""Who is where: ranks and groups, layers to virtual stages, experts to ranks, parameters to owners.
Integers only."""
