"""HTTP: the OpenAI-compatible endpoint.

Promises: requests are validated and tokenised once, owned until they end, answered token by token. Knows the cluster
only as a :class:`~distserve.api.backend.Backend`; imports neither torch nor ray nor zmq. Several processes may each
run an app of their own: nothing here is shared between them.
"""
