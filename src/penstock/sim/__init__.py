"""Pretended engines on virtual time: the real engine, scheduler and router, with a clock that jumps.

Replaces clock, wire and executor, nothing else. Whoever simulates a policy here runs the policy that serves.
"""
