"""Compiled products for CPUs on which torch's own stay below the memory's speed. torch is the reference and fall-back."""
