"""What next-scale models over bits share: the residual quantiser, sampling scale by scale, weight files."""
