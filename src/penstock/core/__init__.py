"""What decides: scheduler, blocks, prefix cache, policies. Standard library and numpy integer arrays only.

No tensor, no clock, no I/O: the live engine, the tests and the simulator run these very objects.
"""
