"""Pillion on a GPU: correctness first, then how close it comes to the machine's limits.

`scripts/gpu-check` runs it, from a checkout or from a bundle that needs nothing but a driver and a Python with
numpy. Without a GPU the same code runs on the fake device (cuda/fake); what that measures means nothing.
"""
