"""The one decoder: engine, scheduler, compiled programs, requests and sampling."""
