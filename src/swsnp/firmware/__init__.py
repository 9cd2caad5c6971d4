"""The AMD Secure Processor with SEV-SNP firmware: what answers mailbox commands and guest messages."""
