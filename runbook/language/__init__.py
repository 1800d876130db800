"""What a person reads, in the person's language. The sources and the JSON reports are English; pages are translated."""
