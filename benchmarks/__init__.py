"""One file a measured path; results are dated files with commit, hardware and command."""
