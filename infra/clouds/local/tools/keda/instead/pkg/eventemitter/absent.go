package eventemitter

import "errors"

// NewAzureEventGridTopicHandler refuses: events go to HTTP.
func NewAzureEventGridTopicHandler(...any) (EventDataHandler, error) {
	return nil, errors.New("this KEDA was built without Azure's Event Grid")
}
