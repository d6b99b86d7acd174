"""`python -m actkit`, and with several processes `torchrun --nproc-per-node 2 -m actkit`."""

from actkit.cli.main import main

if __name__ == "__main__":
    main()
