"""Load generation and measurement for any OpenAI-compatible endpoint.

The package looks at a server strictly from outside, over HTTP, and imports nothing else of ``distserve``: what it
says about our server it would say about another one. A reader starts at ``command`` (what can be asked), then
``session`` (what is done), ``runner`` (how requests are issued on time) and ``metrics`` (what the figures mean).
"""
