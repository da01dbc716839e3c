"""Discrete-event simulation that drives the very state machines of :mod:`distserve.core`."""
