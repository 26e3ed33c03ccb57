"""Simulated parts and checkers, for our own tests and for those of users.

Whatever goes wrong here goes wrong from a seed, so it goes wrong again.
"""
