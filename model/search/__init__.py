"""What Cream searches: the space, its costs, its blocks and the supernet (Peng et al., NeurIPS 2020)."""
