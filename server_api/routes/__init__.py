"""The HTTP surface, one module per noun; each is thin: parse, call the coordinator, answer."""
