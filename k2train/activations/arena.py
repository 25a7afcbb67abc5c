class HostArena:
    def __init__(self, pinned, limit_bytes): pass
