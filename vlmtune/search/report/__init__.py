"""The report page of a finished search: charts, answers, importance of the options."""
