"""Adam in a low-rank projection of each matrix's gradient: GaLore and APOLLO, as rules for one tensor."""
