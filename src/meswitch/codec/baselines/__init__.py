"""Other published ways to compress a delta, to compare with. One file a method; `codec.registry` lists them."""
