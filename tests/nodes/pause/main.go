// The first process of a pod: it holds the namespaces, waits for orphans, and ends when it is told to.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGCHLD)
	for received := range signals {
		if received != syscall.SIGCHLD {
			return
		}
		for {
			var status syscall.WaitStatus
			ended, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
			if err == nil && ended <= 0 || err != nil && err != syscall.EINTR {
				break
			}
		}
	}
}
