"""In-process use: the engine and its schedulers within the caller's own process, without server and without Ray.

Promises what the endpoint promises, with its options and its outputs. The endpoint's checks, tokenising and text
assembly are used as they are; neither Ray nor the web stack is imported.
"""
