"""Several replicas of a family's server behind one endpoint, on Ray Serve; needs the extra `ray`."""
