"""Work that takes long: whole files, settings of a folder, ranks, interrupts."""
