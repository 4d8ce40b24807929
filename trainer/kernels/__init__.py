"""C++ for a decoder's training in float32 on a CPU; `decoder.py` has it as operations of autograd, `build.py` compiles it."""
