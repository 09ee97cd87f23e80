"""The program representation: one ATen graph, named weights, a text form that parses back, a verifier."""
