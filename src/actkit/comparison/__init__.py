"""The fair comparison of functions, MLPs, pooling and attention: `actkit compare-functions`."""
