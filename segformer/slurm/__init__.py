"""Training on a Slurm cluster: settings, batch script, submission, and what runs inside of the job."""
