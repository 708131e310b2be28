"""All weights beside adapters on one base: steps of the default job's sizes, a process each."""
