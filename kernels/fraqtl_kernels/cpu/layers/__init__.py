"""What a decoder needs beside attention, for CPUs: linear layers, norms, rotary embedding, gates.

PyTorch's eager versions take five to fifteen small operators each, which cost more than the arithmetic of a decode step.
"""
