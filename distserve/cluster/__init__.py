"""Running parts as processes: drivers, messages on the wire, Ray actors, supervision and launch."""
