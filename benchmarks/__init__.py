"""Pure: the benchmarks: FX Gateway side by side with nginx and OpenSSH on one machine. See README.md."""
