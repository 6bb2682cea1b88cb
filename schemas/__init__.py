"""What is agreed: the job spec, the Arrow schemas and the error tree.

Imports neither ray, torch nor click, so that every other module can import it for nothing.
"""
