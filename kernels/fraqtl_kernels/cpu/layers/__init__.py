"""What a decoder needs beside attention, for CPUs: linear layers, norms, rotary embedding, gates.

PyTorch's eager versions take five to fifteen small operators each, which cost a decode step more than its arithmetic.
"""
