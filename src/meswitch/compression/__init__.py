"""Checkpoint pair -> artifact, and back.

Its modules are imported one by one: the command line reads the options' help (`options`) without torch.
"""
