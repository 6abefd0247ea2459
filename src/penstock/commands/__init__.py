"""The verbs of the command line, one file each. A verb reads its flags and calls one room; it decides nothing."""
